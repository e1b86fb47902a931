//! Ports that no other test takes between asking for one and listening on it.

use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::Mutex;

/// Below the range from which Linux (32768 and above) and macOS (49152 and above) take the ports of
/// outgoing connections. A port of that range can be taken while its server is down, and a client
/// that keeps reconnecting to it can even connect to itself.
const RANGE: std::ops::Range<u16> = 20_000..32_000;

/// One UDP socket per reserved port, held until this process ends.
static TAKEN: Mutex<Vec<UdpSocket>> = Mutex::new(Vec::new());

/// Reserves a TCP port on 127.0.0.1 for this process, also for times when its server is down.
///
/// Several test processes run at once, so the reservation must hold system-wide. A UDP socket with
/// the same number is the lock: it does not disturb the TCP server, needs no file and is released
/// when the process ends.
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
