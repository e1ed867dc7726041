"""Every request to the store is counted once, under its S3 operation, on both ways to the store."""

from __future__ import annotations

from collections import Counter

from prometheus_client import REGISTRY

from delineate.config import StorageConfig
from delineate.storage import open_storage


def counted() -> Counter[tuple[str, str]]:
    samples = next(metric for metric in REGISTRY.collect() if metric.name == "s3_operations").samples
    return Counter(
        {
            (sample.labels["operation"], sample.labels["status"]): int(sample.value)
            for sample in samples
            if sample.name == "s3_operations_total"
        }
    )


async def test_each_operation_is_counted_once_under_its_own_name(store: StorageConfig) -> None:
    async with open_storage(store) as storage:
        await storage.prepare_buckets()
        before = counted()
        await storage.put_source(70000, b"x" * 100, "a.txt")
        probe = await storage.probe(70000, 10)
        assert probe is not None
        assert await storage.probe(70001, 10) is None
        key = f"{store.archive_prefix}metered.zip"
        upload = await storage.start_upload(key, "a.zip")
        part = await storage.put_part(key, upload, 1, memoryview(b"y" * 50))
        await storage.complete_upload(key, upload, [(1, part)], 50)
        await storage.presign(key, "a.zip", 60)
        assert counted() - before == Counter(
            {
                ("PutObject", "ok"): 1,
                ("GetObject", "ok"): 1,
                ("GetObject", "error"): 1,
                ("CreateMultipartUpload", "ok"): 1,
                ("UploadPart", "ok"): 1,
                ("CompleteMultipartUpload", "ok"): 1,
                ("HeadObject", "ok"): 1,
            }
        )
