"""What goes with a release so that others can check it, and the checking: canary, provenance, signature, proofs."""
