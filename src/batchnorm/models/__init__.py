"""People's models: how they are called, what order they compute in, and how to put them back."""
