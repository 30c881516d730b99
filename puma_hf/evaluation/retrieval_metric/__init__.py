"""A metric for `evaluate.load`: this folder's path, or a copy of the folder on the Hub."""
