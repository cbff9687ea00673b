"""The comparison of defences: every attack on every set under every defence, cached cell by cell
(launch/reproduce.sh)."""
