"""README's table of features, made of what a test run proved.

    python -m pytest --features features.json
    python -m tests.features README.md features.json           # writes the table; --check only compares

A row is an entry of `catalogue`, and is proven by the tests that carry its marker, on a test, a class, a module or a
parameter: `pytest.mark.feature("Endpoints", "Embeddings")`, with the names as the catalogue has them. A new row is an entry
there, a marker on each test that proves it end to end (or the feature would be claimed for one of its parts), and the two
commands above. Tests that need a program or a right that a machine may lack should not be a row's only ones: a whole run fails
where the table claims what none of its tests proved.

What a GPU has proved comes from runs on one, which `python -m bench.gpu` stores beside its results.
"""
