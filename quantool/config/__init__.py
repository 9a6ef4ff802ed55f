"""YAML in, ``Config`` out: the keys, their rules, and every mistake with its line."""
