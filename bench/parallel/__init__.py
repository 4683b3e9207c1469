"""What splitting a model over ranks costs and gives, and how soon a stream goes on when a rank is killed; `bench/README.md`."""
