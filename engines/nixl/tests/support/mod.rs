//! A NIXL agent in a process of its own, and memory of ours.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use kvferry_core::{Plane, PoolId, PoolLayout};
use kvferry_nixl::{Agent, AgentConfig, Notifications};
use kvferry_transport::Pool;
use serde_json::{Value, json};

/// Where the Python with a NIXL wheel is.
pub(crate) const PYTHON: &str = "KVFERRY_NIXL_PYTHON";

/// This test's turn: agents of one process would share UCX's threads, and a machine has few cores. None without a NIXL wheel, unless
/// `KVFERRY_REQUIRE` names nixl-agent.
pub(crate) fn turn() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    match std::env::var(PYTHON) {
        Ok(python) if !python.is_empty() => Some(TURN.lock().unwrap_or_else(PoisonError::into_inner)),
        _ => {
            kvferry_transport::conformance::absent(
                "nixl-agent",
                &format!("{PYTHON} names no Python with a NIXL wheel"),
            );
            None
        }
    }
}

/// A NIXL agent.
pub(crate) struct Peer {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    pub(crate) name: String,
    pub(crate) metadata: Bytes,
    pub(crate) address: u64,
}

impl Peer {
    /// Starts one with so many bytes of memory. Both agents use the same of UCX's transports; `tls` names them.
    pub(crate) fn start(name: &str, bytes: usize, tls: &str) -> Peer {
        Peer::run(name, bytes, tls, None, None)
    }

    /// The same, over tcp, with an etcd.
    pub(crate) fn with_etcd(name: &str, bytes: usize, endpoint: &str) -> Peer {
        Peer::run(name, bytes, "tcp", None, Some(endpoint))
    }

    /// The same, over tcp, with a thread that listens for metadata; and where it does.
    pub(crate) fn listening(name: &str, bytes: usize) -> (Peer, SocketAddr) {
        // NIXL takes no port that nobody chose.
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        (Peer::run(name, bytes, "tcp", Some(free.port()), None), free)
    }

    fn run(name: &str, bytes: usize, tls: &str, port: Option<u16>, etcd: Option<&str>) -> Peer {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peer.py");
        let mut command = Command::new(std::env::var(PYTHON).unwrap());
        command
            .args([script, name, &bytes.to_string()])
            .args(port.map(|port| port.to_string()))
            .env("NIXL_LOG_LEVEL", "ERROR")
            .env_remove("UCX_TLS");
        if !tls.is_empty() {
            command.env("UCX_TLS", tls);
        }
        if let Some(endpoint) = etcd {
            command.env("NIXL_ETCD_ENDPOINTS", endpoint);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let orders = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let name = name.to_owned();
        let mut peer = Peer { child, orders, answers, name, metadata: Bytes::new(), address: 0 };
        let first = peer.answer();
        peer.metadata = unhex(first["metadata"].as_str().unwrap());
        peer.address = first["address"].as_u64().unwrap();
        peer
    }

    /// Gives an order and waits for its answer.
    pub(crate) fn ask(&mut self, order: &Value) -> Value {
        self.order(order);
        let answer = self.answer();
        assert!(answer.get("error").is_none(), "{order}: {answer}");
        answer["ok"].clone()
    }

    pub(crate) fn order(&mut self, order: &Value) {
        writeln!(self.orders.as_mut().unwrap(), "{order}").unwrap();
    }

    pub(crate) fn answer(&mut self) -> Value {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.answers.read_line(&mut line).unwrap() > 0, "the NIXL agent {} ended", self.name);
            if let Some(answer) = line.strip_prefix("PEER ") {
                return serde_json::from_str(answer).unwrap();
            }
        }
    }

    /// What it was told, once there is something.
    pub(crate) fn heard(&mut self) -> Vec<(String, Vec<u8>)> {
        for _ in 0..2000 {
            let heard = self.ask(&json!({"do": "heard"}));
            let heard: Vec<(String, String)> = serde_json::from_value(heard).unwrap();
            if !heard.is_empty() {
                return heard.into_iter().map(|(peer, message)| (peer, unhex(&message).to_vec())).collect();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{} heard nothing for 10 s", self.name);
    }

    /// Waits until it knows an agent, or no longer does.
    pub(crate) fn until_it_knows(&mut self, peer: &str, known: bool) {
        for _ in 0..2000 {
            if self.ask(&json!({"do": "knows", "peer": peer})) == known {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("after 10 s it is not true that {} knows {peer}: {known}", self.name);
    }

    pub(crate) fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// Stops it. A signal is only sent when the call returns; here no thread of it runs any more.
    #[allow(dead_code, reason = "not every test needs it")]
    pub(crate) fn stop(&self) {
        rustix::process::kill_process(self.pid(), rustix::process::Signal::STOP).unwrap();
        let ended = rustix::process::waitpid(Some(self.pid()), rustix::process::WaitOptions::UNTRACED).unwrap();
        assert!(ended.is_some_and(|(_, status)| status.stopped()), "{ended:?}");
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.orders.take());
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// What its memory holds at the beginning.
pub(crate) fn pattern(at: u64) -> u8 {
    ((at * 7 + 3) % 251) as u8
}

/// How an agent of ours is set up that speaks tcp.
pub(crate) fn config() -> AgentConfig {
    AgentConfig::new("kvferry").transports("tcp")
}

/// An agent of ours with a pool of one block of so many bytes, all `byte`, that speaks tcp.
pub(crate) async fn ours(bytes: u64, byte: u8) -> (Agent, Notifications, Pool) {
    with(config(), bytes, byte).await
}

/// The same, set up otherwise.
pub(crate) async fn with(config: AgentConfig, bytes: u64, byte: u8) -> (Agent, Notifications, Pool) {
    let (agent, notifications) = Agent::start(config).await.unwrap();
    let pool = pool(1, bytes, byte);
    agent.register(pool.clone()).await.unwrap();
    (agent, notifications, pool)
}

pub(crate) fn pool(id: u32, bytes: u64, byte: u8) -> Pool {
    let plane = Plane { region: 0, offset: 0, blocks: 1, block_stride: bytes, block_bytes: bytes };
    let layout = PoolLayout { regions: vec![bytes], planes: vec![plane] };
    let pool = Pool::allocate(PoolId(id), layout, "nixl-test").unwrap();
    pool.write(0, 0, 0, &vec![byte; bytes as usize]).unwrap();
    pool
}

pub(crate) fn contents(pool: &Pool) -> Vec<u8> {
    let bytes = pool.layout().regions[0];
    let mut contents = vec![0; bytes as usize];
    pool.read(0, 0, 0, &mut contents).unwrap();
    contents
}

/// Where a pool's memory begins, as peers name it.
pub(crate) fn address(pool: &Pool) -> u64 {
    pool.regions()[0].base() as u64
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Bytes {
    let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(byte).collect::<Vec<u8>>().into()
}

/// Runs a future to its end.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}
