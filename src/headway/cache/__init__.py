"""Who holds which KV blocks: the pool, the prefix cache over it, and one row of block ids per slot."""

from headway.cache.kv import KvCache
from headway.cache.pool import BlockPool
from headway.cache.prefix import PrefixCache, extend_digests
from headway.cache.table import BlockTable

__all__ = ["BlockPool", "BlockTable", "KvCache", "PrefixCache", "extend_digests"]
