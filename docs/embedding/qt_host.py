"""
A Qt window: events reach it as signals, so that nothing but the GUI's own thread touches widgets.

Run it with `python qt_host.py`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from PIL.ImageQt import toqpixmap
from PySide6 import QtCore, QtWidgets

from holdfast.engine import Engine, Hires
from holdfast.engine.subscribers import Event, Finished, Preview, Progressed

if TYPE_CHECKING:
    from PIL.Image import Image

    from holdfast.engine import Job, Result


class Window(QtWidgets.QWidget):
    """A prompt, a button for go and stop, progress, and the image as it comes."""

    told = QtCore.Signal(object)

    def __init__(self, engine: Engine) -> None:
        super().__init__(windowTitle="Holdfast")
        self.engine = engine
        self.job: Job[Result] | None = None
        self.prompt = QtWidgets.QLineEdit("a large red circle on a blue background")
        self.button = QtWidgets.QPushButton("Generate", clicked=self.go_or_stop)
        self.bar = QtWidgets.QProgressBar(maximum=1000)
        self.picture = QtWidgets.QLabel(minimumWidth=256, minimumHeight=256, scaledContents=True)
        layout = QtWidgets.QVBoxLayout(self)
        for widget in (self.prompt, self.button, self.bar, self.picture):
            layout.addWidget(widget)
        # Emitted in the subscriber's thread, received in the window's: Qt queues it.
        self.told.connect(self.hear)
        self.destroyed.connect(engine.subscribe(self.told.emit, [Progressed, Preview, Finished]))

    def go_or_stop(self) -> None:
        """Start a job, or stop the one that runs."""
        if self.job is not None:
            self.job.cancel(keep="first_pass")
        else:
            self.job = self.engine.submit(Hires(prompt=self.prompt.text(), seed=7, scale=2.0))
            self.button.setText("Stop")

    def hear(self, event: Event) -> None:
        """Show what the engine tells of this window's own job."""
        if self.job is None or event.request_id != self.job.request_id:
            return
        if isinstance(event, Progressed):
            self.bar.setValue(round(event.progress.fraction * 1000))
        elif isinstance(event, Preview):
            self.show_image(event.image)
        elif isinstance(event, Finished):
            done = event.status == "done"
            for image in self.job.result().images if done else self.job.kept:
                self.show_image(image)
            self.bar.setValue(1000 if done else 0)
            self.button.setText("Generate")
            self.job = None

    def show_image(self, image: Image) -> None:
        """Put an image, or a small preview of one, into the picture."""
        self.picture.setPixmap(toqpixmap(image))


if __name__ == "__main__":
    application = QtWidgets.QApplication(sys.argv)
    with Engine("demo") as served:
        window = Window(served)
        window.show()
        application.exec()
