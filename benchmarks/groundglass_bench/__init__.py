"""The benchmarks of the whole stack: scenarios that boot what they need, measure in turns, and write a report."""
