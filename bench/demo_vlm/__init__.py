"""`--model demo-vlm`: the pictures it was trained on, its training, and a check of a server that runs it."""
