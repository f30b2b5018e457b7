"""The broker's metrics, by Neon's names."""

from prometheus_client import Counter, Gauge

ACTIVE_PUBLISHERS = Gauge("storage_broker_active_publishers", "Open streams of publishers")
TIMELINE_SUBSCRIBERS = Gauge("storage_broker_per_timeline_active_subscribers", "Open subscriptions to one timeline")
ALL_SUBSCRIBERS = Gauge("storage_broker_all_keys_active_subscribers", "Open subscriptions to all timelines")
PROCESSED = Counter("storage_broker_processed_messages", "Messages received from publishers")
BROADCASTED = Counter("storage_broker_broadcasted_messages", "Messages put into a channel")
DROPPED = Counter("storage_broker_broadcast_dropped_messages", "Messages that a slow subscriber lost")
PUBLISHED_ONEOFF = Counter("storage_broker_published_oneoff_messages", "Messages published by PublishOne")
