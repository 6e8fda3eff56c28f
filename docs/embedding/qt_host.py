"""
A Qt window: events wait in a queue that the window's own thread empties; no other touches Qt.

Run it with `python qt_host.py`.
"""

from __future__ import annotations

from queue import SimpleQueue

from PIL.ImageQt import toqpixmap
from PySide6 import QtCore, QtWidgets

from holdfast.engine import Engine, Event, Finished, Hires, Job, Preview, Progressed, Result


class Window(QtWidgets.QWidget):
    """A prompt, a button for go and stop, progress, and the image as it comes."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(windowTitle="Holdfast")
        self.engine = engine
        self.job: Job[Result] | None = None
        self.prompt = QtWidgets.QLineEdit("a large red circle on a blue background")
        self.button = QtWidgets.QPushButton("Generate")
        self.button.clicked.connect(self.go_or_stop)
        self.bar = QtWidgets.QProgressBar(maximum=1000)
        self.picture = QtWidgets.QLabel(scaledContents=True)
        self.picture.setMinimumSize(256, 256)
        layout = QtWidgets.QVBoxLayout(self)
        for widget in (self.prompt, self.button, self.bar, self.picture):
            layout.addWidget(widget)
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.unsubscribe = engine.subscribe(self.events.put, [Progressed, Preview, Finished])
        timer = QtCore.QTimer(self, interval=30)
        timer.timeout.connect(self.hear)
        timer.start()

    def go_or_stop(self) -> None:
        """Start a job, or stop the one that runs."""
        if self.job is not None:
            self.job.cancel(keep="first_pass")
        else:
            self.job = self.engine.submit(Hires(prompt=self.prompt.text(), seed=7, scale=2.0))
            self.button.setText("Stop")

    def hear(self) -> None:
        """Show what the engine has told of this window's own job."""
        while not self.events.empty():
            event = self.events.get()
            if self.job is None or event.request_id != self.job.request_id:
                continue
            if isinstance(event, Progressed):
                self.bar.setValue(round(event.progress.fraction * 1000))
            elif isinstance(event, Preview):
                self.picture.setPixmap(toqpixmap(event.image))
            elif isinstance(event, Finished):
                self.end(self.job, done=event.status == "done")

    def end(self, job: Job[Result], *, done: bool) -> None:
        """Show the image, or what was kept, and be ready for the next."""
        for image in job.result().images if done else job.kept:
            self.picture.setPixmap(toqpixmap(image))
        self.bar.setValue(1000 if done else 0)
        self.button.setText("Generate")
        self.job = None

    def closeEvent(self, event: object) -> None:  # noqa: ARG002, N802 - Qt's name and signature
        """Hear nothing more."""
        self.unsubscribe()


if __name__ == "__main__":
    application = QtWidgets.QApplication()
    with Engine("demo") as served:
        window = Window(served)
        window.show()
        application.exec()
