from typing import Any

from flask import Flask

from pagerduty_compat.blueprint import events_blueprint

alerts: dict[str, str] = {}


def handle(event: dict[str, Any]) -> None:
    if event.get("event_action") == "trigger":
        alerts[event["dedup_key"]] = event["payload"]["summary"]
    elif event.get("event_action") == "resolve":
        alerts.pop(event["dedup_key"], None)


app = Flask(__name__)
app.register_blueprint(events_blueprint(handle), url_prefix="/pagerduty")
app.add_url_rule("/alerts", view_func=lambda: alerts)
