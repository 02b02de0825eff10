"""Who used what, and what it costs: the values, the contract of their store, the way to it, and prices."""
