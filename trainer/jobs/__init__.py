"""Training jobs: what one is, how it moves between states, where jobs are kept and how workers get them."""
