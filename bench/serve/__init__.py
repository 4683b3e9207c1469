"""The command around `dashinfer.bench`, and servers that it starts; README.md beside this file says how."""
