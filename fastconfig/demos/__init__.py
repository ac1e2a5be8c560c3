"""Worked examples on real problems. ``fastconfig demo burgers`` runs the one there is."""
