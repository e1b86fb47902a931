use super::*;

/// Checks the hosts and ports, and whether one must accept writes; `None` if the URL is refused.
fn check(url: &str, expected: Option<(&[(&str, u16)], bool)>) {
    let servers = Servers::parse(url);
    let read = servers.as_ref().map(|servers| {
        let hosts: Vec<_> = servers
            .each
            .iter()
            .map(|server| (server.get_host(), server.get_port()))
            .collect();
        (hosts, servers.must_accept_writes)
    });
    let expected = expected.map(|(hosts, writes)| (hosts.to_vec(), writes));
    assert_eq!(read, expected, "{url}");
}

#[test]
fn url_names_one_server_or_several() {
    let db: &[(&str, u16)] = &[("db", 5432)];
    check("postgres://app:secret@db/app", Some((db, false)));
    check("postgresql://app@db/app", Some((db, false)));
    check(
        "postgres://app:a,b@one:5433,two/app",
        Some((&[("one", 5433), ("two", 5432)], true)),
    );
    check(
        "postgres://app@[::1]:1,[::2]:2/app",
        Some((&[("[::1]", 1), ("[::2]", 2)], true)),
    );
    check("postgres://one,,two/app", None);
    check("postgres://app@/app?host=one,two", None);
    check("postgres://app:12/3@db/app", None);
    check("postgres://app:pa/ss@db/app", None);
}

#[test]
fn url_says_which_of_its_servers_is_taken() {
    let target =
        |hosts: &str, target: &str| format!("postgres://{hosts}/app?target_session_attrs={target}");
    let db: &[(&str, u16)] = &[("db", 5432)];
    let two: &[(&str, u16)] = &[("one", 5432), ("two", 5432)];
    check(&target("db", "read-write"), Some((db, true)));
    check(&target("db", "primary"), Some((db, true)));
    check(&target("db", "any"), Some((db, false)));
    check(&target("one,two", "any"), Some((two, false)));
    check(&target("one,two", "standby"), None);
    check(&target("db", "read-only"), None);
}

#[test]
fn other_parameters_of_a_url_reach_every_server() {
    let url = "postgres://one,two/app?target_session_attrs=any&options=-c%20geqo%3Doff&application_name=mine";
    let servers = Servers::parse(url).expect("it is a URL");
    for server in &servers.each {
        assert_eq!(server.get_options(), Some("-c geqo=off"));
        assert_eq!(server.get_application_name(), Some("mine"));
        assert_eq!(server.get_database(), Some("app"));
    }
}
