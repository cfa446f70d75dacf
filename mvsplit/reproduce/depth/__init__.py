"""The depth bench: every rule at its own learning rate, at several depths, over seeds."""
