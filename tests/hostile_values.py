"""Values that files and settings may hold and should not."""


def nested(depth):
    """A list in a list in a list, so many deep."""
    value = []
    for _ in range(depth):
        value = [value]
    return value
