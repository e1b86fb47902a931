use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;

use super::{BodyError, Budget, read};

const LIMIT: usize = 10;

fn chunks(chunks: &[&'static str]) -> impl futures_util::Stream<Item = Result<Bytes, Infallible>> {
    let chunks: Vec<_> = chunks
        .iter()
        .map(|chunk| Ok(Bytes::from_static(chunk.as_bytes())))
        .collect();
    stream::iter(chunks)
}

async fn read_all(
    given: &[&'static str],
    declared: Option<u64>,
    budget: &Arc<Budget>,
) -> Result<Bytes, BodyError> {
    read(chunks(given), declared, LIMIT, budget).await
}

#[tokio::test]
async fn chunks_are_joined_in_order() {
    let budget = Budget::new(100);
    for given in [
        &[][..],
        &[""],
        &["ab"],
        &["ab", "cd"],
        &["a", "", "b", "cdefghij"],
    ] {
        for declared in [None, Some(10)] {
            let body = read_all(given, declared, &budget)
                .await
                .expect("it is within the limit");
            assert_eq!(body, given.concat());
        }
    }
}

#[tokio::test]
async fn one_chunk_is_not_copied() {
    let budget = Budget::new(100);
    let chunk = Bytes::from_static(b"abc");
    let body = read(
        stream::iter([Ok::<_, Infallible>(chunk.clone())]),
        None,
        LIMIT,
        &budget,
    )
    .await;
    assert_eq!(
        body.expect("it is within the limit").as_ptr(),
        chunk.as_ptr()
    );
}

#[tokio::test]
async fn the_limit_includes_its_last_byte() {
    let budget = Budget::new(100);
    let too_large = Err(BodyError::TooLarge { limit: LIMIT });
    assert_eq!(
        read_all(&["0123456789"], None, &budget).await.as_deref(),
        Ok(&b"0123456789"[..])
    );
    assert_eq!(read_all(&["01234567890"], None, &budget).await, too_large);
    assert_eq!(
        read_all(&["012345", "67890"], None, &budget).await,
        too_large
    );
    assert_eq!(read_all(&["a"], Some(11), &budget).await, too_large);
    assert_eq!(read_all(&["a"], Some(u64::MAX), &budget).await, too_large);
    assert_eq!(budget.bytes(), 0, "a refused body gives its share back");
}

#[tokio::test]
async fn a_body_holds_its_share_until_its_last_reference_is_dropped() {
    let budget = Budget::new(15);
    let first = read_all(&["01234", "56789"], None, &budget)
        .await
        .expect("there is room");
    assert_eq!(budget.bytes(), 10);
    assert_eq!(
        read_all(&["012", "345"], None, &budget).await,
        Err(BodyError::NoRoom)
    );
    assert_eq!(budget.bytes(), 10);
    let second = first.clone();
    drop(first);
    assert_eq!(budget.bytes(), 10);
    drop(second);
    assert_eq!(budget.bytes(), 0);
    assert!(read_all(&["012345"], None, &budget).await.is_ok());
}

#[tokio::test]
async fn a_body_that_ends_early_is_an_error() {
    let budget = Budget::new(100);
    let given = stream::iter([Ok(Bytes::from_static(b"ab")), Err("reset")]);
    assert_eq!(
        read(given, None, LIMIT, &budget).await,
        Err(BodyError::Broken)
    );
    assert_eq!(budget.bytes(), 0);
}
