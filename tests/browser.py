"""Load a page in a real browser (Qt WebEngine's Chromium). Run as a script; its dependencies are in .venv/browser.

    python tests/browser.py page.html light|dark picture.png 'an expression in JavaScript'

Prints one line of JSON: the expression's value, every URL that the page requested, and the console messages.
"""

import json
import os
import sys

os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QT_QUICK_BACKEND": "software"}
path, style, picture, expression = sys.argv[1:]
scheme = ("dark", "light").index(style)  # stands in for the system's preference
flags = f"--no-sandbox --disable-gpu --blink-settings=preferredColorScheme={scheme}"  # no sandbox as root
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = flags

from PyQt6.QtCore import QTimer, QUrl  # noqa: E402
from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor  # noqa: E402
from PyQt6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PyQt6.QtWidgets import QApplication  # noqa: E402

found = {"asked": [], "console": []}


class Interceptor(QWebEngineUrlRequestInterceptor):
    def interceptRequest(self, info):
        found["asked"].append(info.requestUrl().toString()[:100])


class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level, message, line, source):
        found["console"].append(message)


app = QApplication(sys.argv[:1])
view, interceptor = QWebEngineView(), Interceptor()
page = Page(view)
page.setUrlRequestInterceptor(interceptor)
view.setPage(page)
view.resize(1200, 1600)


def look(loaded):
    def end(result):
        found["loaded"], found["result"] = loaded, result
        QTimer.singleShot(500, photograph)  # give the layout time to be painted

    page.runJavaScript(expression, end)


def photograph():
    view.grab().save(picture)
    print(json.dumps(found))
    app.quit()


page.loadFinished.connect(look)
page.load(QUrl.fromLocalFile(os.path.abspath(path)))
view.show()
sys.exit(app.exec())
