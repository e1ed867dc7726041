"""Everything S3: the files that jobs read, the archives they write, and the links that clients get."""

from delineate.storage.answers import ObjectInfo
from delineate.storage.archives import UnfinishedUpload
from delineate.storage.buckets import wait_for_storage
from delineate.storage.sources import Probe
from delineate.storage.storage import Storage, open_storage, store_address

__all__ = ["ObjectInfo", "Probe", "Storage", "UnfinishedUpload", "open_storage", "store_address", "wait_for_storage"]
