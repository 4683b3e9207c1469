"""README's table of features, made of what a test run proved.

    python -m pytest --features features.json
    python -m tests.features README.md features.json           # writes the table; --check only compares

A row is an entry of `catalogue`, and is proven by the tests that carry its marker, on a test, a class, a module or a
parameter: `pytest.mark.feature("Endpoints", "Embeddings")`, with the names as the catalogue has them. A new row is an entry
there, a marker on each test that proves it end to end (or the feature would be claimed for one of its parts), and the two
commands above. A whole run fails where the table claims what none of its tests proved; where those of a row need what a
machine may lack, the entry's `needs` says so, and a run that skipped them all only tells of it.

What a GPU has proved comes from runs on one, which `python -m bench.gpu` stores beside its results.
"""
