"""Files of models that can be downloaded."""


class Released(str):
    """The name of an official file: the last part of its address, so that what is downloaded has the name it needs."""

    def __new__(cls, url: str, directory: str):
        name = super().__new__(cls, url.rpartition("/")[2])
        name.url, name.directory = url, directory
        return name

    def __getnewargs__(self) -> tuple[str, str]:
        return self.url, self.directory

    def entry(self) -> dict:
        """What the editor's dialog of missing models shows."""
        return {"name": str(self), "url": self.url, "directory": self.directory}
