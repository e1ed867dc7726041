"""Everything Redis: keys, the job queue, progress events, the Lua transitions."""
