"""`dashinfer_bench` with servers that it starts, on the machine that it measures; README.md beside this file has examples."""
