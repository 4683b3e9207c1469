"""`python -m bench.vlm`: images/s and time to first token; every option is `bench.serve`'s, some with other defaults."""

from bench.serve.__main__ import main

if __name__ == "__main__":
    main("bench.vlm", images=((224, 224), (640, 480), (1000, 1000)), concurrency=(1, 8), output_tokens=32)
