"""DeviceLoader: batches on the device, ahead of use.

- `loader.py`     the public class
- `epoch.py`      one pass over the loader, and the simple way to feed it
- `feed.py`       the thread that loads and copies ahead
- `transport.py`  streams, events, memory: how a batch gets to a CUDA device and when its memory is free again
- `finish.py`     what happens to a batch once it is on the device
- `normalize.py`  uint8 images to normalised ones; `normalize_kernel.py` does it in one kernel
- `stats.py`      where the time went
- `staging.py`    what travels together, and the ring of pinned buffers through which pageable memory travels
"""
