"""Stand-ins for the names of other libraries, so that scripts written for them run on nucleate without an edit."""

__all__: list[str] = []
