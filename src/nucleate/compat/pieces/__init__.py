"""Small parts of Lightning's surface that scripts import beside Fabric, and that nucleate itself has no use for."""

__all__: list[str] = []
