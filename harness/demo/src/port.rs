//! Ports that nobody else takes between asking for one and listening on it.

use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::Mutex;

/// Below the range from which Linux (32768) and macOS (49152) take the ports of outgoing
/// connections. A port inside that range can be taken while its server is down, and a client that
/// keeps dialling it can even connect to itself.
const RANGE: std::ops::Range<u16> = 20_000..32_000;

/// One UDP socket per port given out, held for the life of this process.
static TAKEN: Mutex<Vec<UdpSocket>> = Mutex::new(Vec::new());

/// A TCP port on 127.0.0.1 that stays reserved for this process, also while its server is down.
///
/// Tests run as many processes at once, so a port has to be taken system-wide. The UDP socket of
/// the same number is the lock: it does not hinder the TCP server, needs no file and goes away with
/// the process.
///
/// # Panics
/// When every port of the range is taken.
pub fn free() -> u16 {
    let count = RANGE.end - RANGE.start;
    let start = u16::try_from(RandomState::new().hash_one(0) % u64::from(count))
        .expect("a remainder of a u16 is a u16");
    (0..count)
        .map(|step| RANGE.start + (start + step) % count)
        .find(|&port| reserve(port))
        .expect("12,000 ports are more than the tests of one machine use at a time")
}

fn reserve(port: u16) -> bool {
    let Ok(lock) = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)) else {
        return false;
    };
    if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err() {
        return false;
    }
    TAKEN
        .lock()
        .expect("no holder of this lock panics")
        .push(lock);
    true
}
