"""The way from Python objects to the engine in C++: checks, addresses, packing."""
