"""What the benchmark commands share: random weights, FLOP counts, timing, peers, reports."""
