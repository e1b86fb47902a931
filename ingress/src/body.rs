//! Request bodies: read within a limit, and counted for as long as they are in memory.
//!
//! Owns the budget of all bodies together. Invariant: the budget counts exactly the bodies in
//! memory, because a body gives its share back when its last reference is dropped. The NATS client
//! may hold a body for longer than its request lasts.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _};

pub(crate) const BUDGET_BYTES: usize = 32 << 20;

/// Why a body was not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("the body is over the limit of {limit} bytes")]
    TooLarge { limit: usize },
    #[error("too many deliveries are waiting")]
    NoRoom,
    /// The client disconnected, or its chunks were malformed.
    #[error("the body ended early")]
    Broken,
}

/// The bytes of bodies in memory, and their limit.
#[derive(Debug)]
pub(crate) struct Budget {
    bytes_max: usize,
    bytes: AtomicUsize,
}

impl Budget {
    pub(crate) fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes_max,
            bytes: AtomicUsize::new(0),
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// A share of the budget, which is given back on drop.
struct Share {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Share {
    fn grow(&mut self, bytes: usize) -> Result<(), BodyError> {
        let room = |held: usize| {
            held.checked_add(bytes)
                .filter(|total| *total <= self.budget.bytes_max)
        };
        self.budget
            .bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, room)
            .map_err(|_| BodyError::NoRoom)?;
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Reads a body of at most `limit` bytes into one buffer, which holds a share of `budget`.
///
/// `declared` is the request's `Content-Length`, if it has one. A body of one chunk is not copied;
/// otherwise each chunk is copied once.
pub(crate) async fn read<B: Buf, E>(
    chunks: impl Stream<Item = Result<B, E>>,
    declared: Option<u64>,
    limit: usize,
    budget: &Arc<Budget>,
) -> Result<Bytes, BodyError> {
    let declared = match declared.map(usize::try_from) {
        None => None,
        Some(Ok(length)) if length <= limit => Some(length),
        Some(_) => return Err(BodyError::TooLarge { limit }),
    };
    let mut share = Share {
        budget: Arc::clone(budget),
        bytes: 0,
    };
    let mut body = Joined::Nothing;
    let mut chunks = std::pin::pin!(chunks);
    while let Some(chunk) = chunks.next().await {
        let mut chunk = chunk.map_err(|_| BodyError::Broken)?;
        if chunk.remaining() > limit - share.bytes {
            return Err(BodyError::TooLarge { limit });
        }
        share.grow(chunk.remaining())?;
        body = body.join(chunk.copy_to_bytes(chunk.remaining()), declared);
    }
    Ok(Bytes::from_owner(Held {
        bytes: body.into_bytes(),
        _share: share,
    }))
}

/// The chunks of a body so far. Several chunks are copied into one buffer: a small chunk that is
/// kept would keep the whole buffer that it was read into.
enum Joined {
    Nothing,
    One(Bytes),
    Many(BytesMut),
}

impl Joined {
    fn join(self, chunk: Bytes, declared: Option<usize>) -> Self {
        let mut joined = match self {
            Self::Nothing => return Self::One(chunk),
            Self::One(first) => {
                let mut joined =
                    BytesMut::with_capacity(declared.unwrap_or(first.len() + chunk.len()));
                joined.extend_from_slice(&first);
                joined
            }
            Self::Many(joined) => joined,
        };
        joined.extend_from_slice(&chunk);
        Self::Many(joined)
    }

    fn into_bytes(self) -> Bytes {
        match self {
            Self::Nothing => Bytes::new(),
            Self::One(chunk) => chunk,
            Self::Many(joined) => joined.freeze(),
        }
    }
}

struct Held {
    bytes: Bytes,
    _share: Share,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests;
