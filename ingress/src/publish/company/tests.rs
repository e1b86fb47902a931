use tokio::time::Instant;

use super::Company;

/// How many of `batches` wait, where nobody ever comes back.
fn waits_in_vain(company: &mut Company, batches: usize) -> usize {
    let wait = |company: &mut Company| {
        company.leave(32, 0, Instant::now());
        let waits = company.is_expected(1);
        if waits {
            company.stay_away();
        }
        usize::from(waits)
    };
    (0..batches).map(|_| wait(company)).sum()
}

#[test]
fn a_batch_waits_for_those_who_left_until_most_of_them_are_back() {
    let mut company = Company::new(256);
    company.leave(32, 32, Instant::now());
    assert!(company.is_expected(32));
    assert!(company.is_expected(55));
    assert!(!company.is_expected(56));
    assert!(!company.is_expected(1), "once it was enough, it is over");
}

#[test]
fn nobody_waits_for_a_few() {
    let mut company = Company::new(256);
    assert!(!company.is_expected(1), "before anybody left");
    company.leave(7, 0, Instant::now());
    assert!(!company.is_expected(1));
}

#[test]
fn who_waits_in_vain_waits_less_and_less_until_it_pays_again() {
    let mut company = Company::new(256);
    assert!(waits_in_vain(&mut company, 1_000) < 25);
    while company.until.is_none() {
        company.leave(32, 0, Instant::now());
    }
    assert!(!company.is_expected(28), "they are back");
    company.leave(32, 0, Instant::now());
    assert!(company.is_expected(1), "and are waited for again");
}
