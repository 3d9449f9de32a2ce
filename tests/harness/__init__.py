"""What the tests share: a table of layers, an oracle, and one way to run a layer on any backend."""
