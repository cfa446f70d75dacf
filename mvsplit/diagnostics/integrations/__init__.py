"""The watch in other people's trainers, and its numbers in their trackers.

Each module needs the package that it is named after and is imported only where it is used:
`transformers`, `lightning` (extra `trainers`); `tensorboard`, `wandb` (extra `track`).
"""
