"""A page and a keyword index for every file of a repository, kept true."""

__version__ = "0.1.0"
