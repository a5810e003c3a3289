#!/bin/sh
# Fire or resolve an alert at an Alertmanager, through its API v2.
#
#   sample/alert.sh fire NAME      an alert that fires for an hour
#   sample/alert.sh resolve NAME   the same alert, over
#
# ALERTMANAGER is its address, http://127.0.0.1:9093 if unset.
set -eu

usage() {
	echo "usage: $0 fire|resolve NAME" >&2
	exit 2
}

[ $# = 2 ] || usage
case $1 in
	fire) ends=$(date -u -d '+1 hour' +%FT%TZ 2>/dev/null || date -u -v+1H +%FT%TZ) ;;
	resolve) ends=$(date -u +%FT%TZ) ;;
	*) usage ;;
esac

curl --fail --silent --show-error \
	-H 'Content-Type: application/json' \
	-d '[{"labels": {"alertname": "'"$2"'", "instance": "db1"}, "endsAt": "'"$ends"'"}]' \
	"${ALERTMANAGER:-http://127.0.0.1:9093}/api/v2/alerts"
