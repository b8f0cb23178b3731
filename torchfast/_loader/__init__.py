"""DeviceLoader: batches on the device, ahead of use.

- `loader.py`     the public class; `checks.py` what it refuses
- `epoch.py`      one pass over the loader, and the simple way to feed it
- `wrapped.py`    what is known about the loaders that are wrapped
- `feed.py`       the thread that loads and copies ahead, as the loop sees it; `thread.py` is its own side
- `permits.py`    how the loop lets it send, without waking it when that would only disturb
- `turns.py`      which of the two sends a batch
- `modes.py`      what that thread takes over from the one that began the pass
- `transport.py`  streams, events, memory: how a batch gets to a CUDA device and when its memory is free again
- `late.py`       what moves by its own `.to`
- `finish.py`     what happens to a batch once it is on the device
- `normalize.py`  uint8 images to normalised ones; `normalize_kernel.py` does it in one kernel
- `stats.py`      where the time went; `cpus.py` how many CPUs there are for it
- `plan.py`       what of a batch travels together, and the tensors that it becomes
- `plans.py`      which batches are built alike, and so travel by the same plan
- `shipment.py`   the copies of one batch; `driver.py` enqueues many in one call
- `staging.py`    the ring of pinned buffers through which pageable memory travels
- `helpers.py`    copies many small tensors there side by side; `shared_memory.py` reads what workers send
- `unwaited.py`   threads that nobody waits for; `flag.py` an event that no interrupt can break
"""
