"""The serving side: scan aggregator, embedded Triton, stand-in backends, checks of the model repository."""
