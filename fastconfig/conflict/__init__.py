"""Seeing the losses' conflict: its record, its pictures, and the learning rate that follows it."""
