"""The API process: REST and SSE over HTTP."""
