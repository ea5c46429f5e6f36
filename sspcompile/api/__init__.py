"""The library: each module is one thing that users do, from arguments to values; the command line is a thin layer on it."""
