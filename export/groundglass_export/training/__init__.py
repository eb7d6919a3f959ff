"""Training of the network on public data, by a recipe that a TOML file describes."""
