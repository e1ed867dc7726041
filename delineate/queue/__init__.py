"""Everything Redis: keys, the job queue, progress events, the Lua transitions."""

from delineate.queue.intake import Enqueued, QueueStats, RateLimit
from delineate.queue.queue import Queue, open_queue
from delineate.queue.record import CorruptRecord
from delineate.queue.upkeep import Reaped

__all__ = ["CorruptRecord", "Enqueued", "Queue", "QueueStats", "RateLimit", "Reaped", "open_queue"]
