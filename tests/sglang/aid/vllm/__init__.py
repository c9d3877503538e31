"""Stands in for a package that SGLang's CPU path imports a name from and never calls."""
