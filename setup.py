"""What setup.cfg, which holds the rest, cannot say: editable installs get data files too."""

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel


class EditableWheel(editable_wheel):
    """Installs data files as wheels do: setuptools asks for ``has_data``, which its distribution calls otherwise."""

    def run(self) -> None:
        self.distribution.has_data = self.distribution.has_data_files
        super().run()


setup(cmdclass={"editable_wheel": EditableWheel})
