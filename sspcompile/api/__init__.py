"""The library: each module is one thing that users do; the command line is a thin layer on it."""
