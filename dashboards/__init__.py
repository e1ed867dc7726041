"""The Grafana dashboards: what each shows is said here in Python, and `make dashboards` writes the JSON beside it.

    api_overview      what callers get
    download_jobs     what becomes of their jobs
    infrastructure    what all of it runs on
    panels            the few kinds of panel they are made of

Grafana reads the JSON alone. The builders are Grafana's own, so a misspelt option is an error of mypy, not a panel
that silently ignores it; one hand keeps units, legends, links and colours the same in all of them.
"""
